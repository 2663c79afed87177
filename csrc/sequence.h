// What crosses from the operators (ops.cpp) to the drivers: sizes, pointers and the plan, as plain data.
// No torch here. Drivers trust every size and pointer: ops.cpp has checked them.
//
// The letters, used everywhere:
//   T steps, N batch, I input size, H hidden size, P size of h (the projection's size, else H), G gates.
//   Last dimension fastest. `d` before a name is the gradient of that thing.
//   j numbers the sequences of the batch in the driver's order: longest first. `row` numbers (step, j) pairs so that
//   the active rows of one step lie together and steps follow in time order; R is the number of rows.
// Unit layout: state-sized rows are padded to whole blocks of kBlock units, and what is kept of a row's gates is
//   [blocks][slots][kBlock]. It does not depend on the instruction set, so a backward may run on another than its
//   forward.
#pragma once

#include <cstdint>

namespace rnnfast {

// Units in a block: one 64-byte vector of the accumulation type.
template <typename T>
constexpr int64_t kBlock = 64 / sizeof(T);

struct CellInfo {
  const char* name;
  const char* source;
  int gates, slots;
  bool has_cell;      // a second state, c
  bool saves_hidden;  // backward needs a copy of h
  int late_gates;     // of the gates, those whose recurrent product is not of h alone (cells.h)
  int peepholes;      // vectors of weights by which gates see c
  int norm_vectors;   // vectors of layer normalization's weights
  bool has_resident;  // on a GPU (cuda/plan.h)
};

// Memory outside the driver whose row for sequence n at step t is data + t * step + n * row, unit stride inside.
// For packed input `step` is unused: rows follow each other.
template <typename T>
struct Rows {
  T* data;
  int64_t step, row;
};

// Splits [0, n) over at most `threads` workers and calls body(context, begin, end) on each; returns when all are done.
using ParallelFor = void (*)(int64_t n, int threads, void* context, void (*body)(void*, int64_t, int64_t));

// A call with at most so many rows reads its weights in place: it would not repay rearranging them.
constexpr int64_t kInPlaceRows = 16;

enum class Schedule {
  kOneThread,
  kBatch,  // each thread takes a part of the batch through all steps
  kUnits,  // each thread takes a part of the hidden units, and they meet after each step
};

// How one call will run. Made by make_plan (cpu/dispatch.cpp), reported by _C.explain.
struct Plan {
  Schedule schedule;
  int threads;
  bool packed;          // weights rearranged into panels; else read in place (at most kInPlaceRows rows)
  bool packs_columns;   // W_ih rearranged all the same: tokens look up its columns, step after step
  int64_t chunk_steps;  // steps whose input product (backward: weight gradients) is done together
};

struct Sizes {
  int64_t T, N, I, H, P;
  int64_t R;  // rows
};

// A product outside the kernels of a GPU driver: C = op(A) op(B), or C += with `accumulate`. Row-major with leading
// dimensions in elements; A and B are of type E of the call, C of E or, where `wide`, of T.
struct Product {
  bool transpose_a, transpose_b;
  int64_t m, n, k;  // op(A) [m, k], op(B) [k, n]
  const void *a, *b;
  void* c;
  int64_t lda, ldb, ldc;
  bool accumulate, wide;
};
using Gemm = void (*)(void* context, const Product&);

// What the drivers of a GPU (cuda/) need beside; pointers are to its memory.
struct Device {
  int capability;                     // 90 for 9.0
  int multiprocessors;                // of the device
  int64_t block_memory;               // bytes of shared memory that one block can have
  bool tf32;                          // float32 products may round their factors to tf32
  void* stream;                       // cudaStream_t
  Gemm gemm;                          // products outside our kernels
  void* gemm_context;                 // its first argument
  const int64_t *active, *first_row;  // [T] as in SequenceParams, of packed input, else null
  const int64_t* lengths;             // [N], or null where every sequence has T steps
};

// T is the accumulating type, E that of what users give and get. Pointers are null where the thing does not exist or is
// not wanted; all but active, first_row and order are to memory of the device that computes.
template <typename T, typename E = T>
struct SequenceParams {
  Sizes size;
  Plan plan;
  bool reverse;   // time runs backwards
  bool training;  // forward keeps gates, cells, hidden
  // A sequence may be taken in parts, one call each, that share plan and scratch: the first makes of the weights what
  // the others find there, and of their gradients the last stores the sums of all. A part is described as a sequence,
  // but first_row goes on counting.
  bool is_first_part, is_last_part;
  bool has_step_after;  // step T, which is not this part's, follows in time
  bool turned;          // weights are read in the other order; of calls that follow each other every second one
  bool has_packed;  // rearranged weights are in `packed_weights`: of the weights only w_ch, w_ln, b_ih, b_hh are read
  bool is_packed;   // input and output are [R, ...], see Rows
  ParallelFor parallel_for;
  Device device;  // of a GPU driver

  const int64_t* active;     // [T] sequences that have a step t; never rising with t
  const int64_t* first_row;  // [T] sum of active before t
  const int64_t* order;      // [N] position in the batch of the j-th longest, or null for j itself
  const bool* resets;        // [T, N] state is zero before the step, or null

  Rows<const E> input;                 // [T, N, I]; null where tokens are given
  Rows<const int64_t> tokens;          // [T, N], 0 <= token < I, or null: the input is the one-hot row of the token
  const E *h0, *c0;                    // [N, P], [N, H]
  const E *w_ih, *w_hh, *b_ih, *b_hh;  // [G*H, I], [G*H, P], [G*H], [G*H]
  const E* w_hr;                       // [P, H]
  const E* w_ch;                       // [peepholes, H]
  const E* w_ln;                       // [norm_vectors, H]: gains of both products; of a cell with c gain_c and b_c
  const E* recurrent_mask;             // [N, P] multiplies h where it enters the recurrent product
  Rows<const E> keep_h, keep_c;        // [T, N, H] the share of the old state that stays (zoneout); not if projected

  Rows<E> output;  // [T, N, P], = ; forward only; null where only what is kept is wanted
  Rows<E> all_c;   // [T, N, H], = ; forward only
  E *h_n, *c_n;    // [N, P], [N, H], =
  T* gates;        // [R, blocks(H), slots, kBlock], kept for backward
  T* cells;        // [R, blocks(H) * kBlock], kept for backward by cells with c
  T* hidden;       // [R, blocks(P) * kBlock], kept for backward where saves_hidden, projected, keep_h or keep_c

  // backward; each gradient is written with =, none is read
  Rows<const E> doutput;                     // [T, N, P]
  Rows<const E> dall_c;                      // [T, N, H]
  const E *dh_n, *dc_n;                      // [N, P], [N, H]
  Rows<E> dinput;                            // [T, N, I]
  E *dh0, *dc0;                              // [N, P], [N, H]
  E *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr;  // as the weights
  E *dw_ch, *dw_ln;
  // The factors of the weight gradients, for who sums their products over some of the rows only (one sequence, say):
  // dW_ih = dgates_ih^T x, dW_hh = dgates_hh^T h_prev, dW_hr = dprojected^T h_raw over all rows. Torch's gate order.
  Rows<T> dgates_ih, dgates_hh;  // [T, N, G*H]
  Rows<T> h_prev;                // [T, N, P] h before the step
  Rows<T> dprojected, h_raw;     // [T, N, P], [T, N, H] of a projected cell: after and before the projection

  // Forward on the CPU: Driver::packed_weights elements for the rearranged weights, that the caller keeps from call to
  // call; or null, and they are in the scratch.
  T* packed_weights;
  T* scratch;  // Driver::forward_scratch or backward_scratch elements, owned by the caller for the call
};

// One cell on one instruction set or device.
template <typename T, typename E = T>
struct Driver {
  using Params = SequenceParams<T, E>;
  int64_t (*forward_scratch)(const Params&);
  int64_t (*backward_scratch)(const Params&);
  void (*forward)(const Params&);
  void (*backward)(const Params&);
  int64_t (*packed_weights)(const Params&);  // null: takes none from call to call
};

// Rows that the softmax takes at a time; ld is a multiple of it.
constexpr int64_t kSoftmaxRows = 16;

// Softmax cross entropy of `rows` rows of V scores each, that lie as columns.
template <typename T>
struct SoftmaxParams {
  int64_t rows, V, ld;
  T* scores;      // [V, ld], of which `rows` columns count; with `grad` = softmax(scores + bias) - one_hot(target)
  const T* bias;  // [V] or null
  const int64_t* targets;   // [rows], 0 <= target < V
  T *total, *target_score;  // [rows], =: the loss is log(total) - target_score
  bool grad;
  T scale;  // of what is left in scores
};

// The same of a linear layer's scores, with its gradients, for a chunk of rows. Units of work are blocks of kLossRows
// rows; ld is a multiple of it, and P16 the next multiple of 16 after P.
constexpr int64_t kLossRows = 64;
template <typename T>
struct LossParams {
  SoftmaxParams<T> softmax;  // of W h, into scores
  int64_t P;
  const T* hidden;   // [rows, P]
  const T* weight;   // [V, P]
  T *rows_t, *rows;  // scratch of ld * P and ld * P16 elements: hidden in panels, of columns and of rows
  T* weight_rows;    // scratch of V * P16 elements: W in panels of rows, made once for all chunks; or null
  T* grad_hidden;    // [rows, P], =; or null
  T* grad_weight;    // [V, P], +=; or null
  T* grad_bias;      // [V], +=; or null
};
template <typename T>
struct LossDriver {
  void (*pack)(const LossParams<T>&, int64_t begin, int64_t end);     // rows [begin, end) of W to weight_rows
  void (*rows)(const LossParams<T>&, int64_t begin, int64_t end);     // blocks: scores, softmax, grad_hidden
  void (*weights)(const LossParams<T>&, int64_t begin, int64_t end);  // then: rows of grad_weight, grad_bias
};

constexpr int kMaxCells = 32;

// 16-bit floating-point numbers as they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Everything compiled for one instruction set, or for CUDA; cell i of one is cell i of all.
struct DriverTable {
  const char* isa;
  int num_cells;
  CellInfo cells[kMaxCells];
  Driver<float> f32[kMaxCells];
  Driver<double> f64[kMaxCells];
  Driver<float, Half> f16[kMaxCells];  // null functions where 16-bit numbers are to be widened first
  Driver<float, BFloat16> bf16[kMaxCells];
  void (*softmax_f32)(const SoftmaxParams<float>&, int64_t begin, int64_t end);  // rows [begin, end)
  void (*softmax_f64)(const SoftmaxParams<double>&, int64_t begin, int64_t end);
  LossDriver<float> loss_f32;
  LossDriver<double> loss_f64;
};

#ifdef RNNFAST_CUDA
// cuda/driver.h, compiled for the device.
const DriverTable& cuda_drivers();
#endif

// cpu/dispatch.cpp: the table of the instruction set in force.
const DriverTable& drivers();
const char* const* supported_isas();  // best first, ends with null
bool set_isa(const char* name);       // false: unknown, or not of this machine
// One more for set_isa, compiled elsewhere from this header: tests add the GPU drivers over an emulated device.
void add_drivers(const DriverTable*);
// `number_bytes` of what the products multiply; `keeps_weights`: from call to call, rearranged.
Plan make_plan(const Sizes&, const CellInfo&, int64_t number_bytes, int threads, bool backward, bool keeps_weights);

}  // namespace rnnfast
