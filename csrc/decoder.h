// rnnfast.Decoder: layers taken one step at a time from Python, with as little as can be between the call and the
// kernel. It owns its weights, rearranged, and its state.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace rnnfast {

void bind_decoder(pybind11::module& m);

}  // namespace rnnfast
