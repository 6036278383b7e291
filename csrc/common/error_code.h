// STABLE_TORCH_ERROR_CODE_CHECK(call) throws if a call of torch's C interface fails. torch 2.11 has it under an older name.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
