// Every kernel, as one translation unit: the build makes one binary of it.

#include "cache.cu"
#include "decode.cu"
#include "layer.cu"
#include "prefill.cu"
#include "prefill_wgmma.cu"
#include "products.cu"
