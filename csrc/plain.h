// Calls of modules that ask for nothing special, in C++ from the module to its operators.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace rnnfast {

void bind_plain_calls(pybind11::module& m);

}  // namespace rnnfast
