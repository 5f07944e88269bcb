// The instruction sets' entry points. One that was not compiled for this CPU is a null pointer.
#pragma once

#include "step.h"

namespace fabric {

using RunStep = void (*)(Step& step, int thread);

__attribute__((weak)) void run_step_amx(Step& step, int thread);
__attribute__((weak)) void run_step_avx512_bf16(Step& step, int thread);
__attribute__((weak)) void run_step_avx2(Step& step, int thread);

}  // namespace fabric
