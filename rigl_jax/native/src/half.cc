// The products in bfloat16 of one instruction-set level. Built with -DLEVEL=rigl_half -DLANES=16 and its flags.
#include "half.h"

extern "C" const HalfKernels LEVEL = {half_tile, half_gather, half_scatter, half_dots, reorder};
