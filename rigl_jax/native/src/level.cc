// One instruction-set level of the kernels. Built several times: -DLEVEL=rigl_avx2 -DLANES=8 -mavx2 -mfma, and so on.
#include "conv.h"
#include "linear.h"

#define NAME_OF(level) #level
#define NAME(level) NAME_OF(level)

extern "C" const Kernels LEVEL = {NAME(LEVEL), LANES, sound, reorder, tile,
                                  gather, scatter, dots, planes, read, dots_planes, spin};
