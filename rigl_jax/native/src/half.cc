// The products in bfloat16 of one instruction-set level. Built with -DLEVEL=rigl_half -DLANES=16 and its flags.
#include "half.h"
// After it, for its overloads of what convolutions call.
#include "conv.h"

namespace {

void half_planes(const Planes& p, Floats x, uint16_t* out, int64_t group, int64_t row) {
  planes_of(p, (const Half*)x.data, out, group, row);
}

}  // namespace

extern "C" const HalfKernels LEVEL = {WORDS,     sound,   half_tile,   half_gather, half_scatter,
                                      half_dots, reorder, half_planes, read,        dots_planes};
