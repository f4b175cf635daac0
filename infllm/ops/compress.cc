// SPDX-License-Identifier: Apache-2.0
#include "infllm/ops/compress.h"

#include "infllm/ops/check.h"

namespace infllm {

Status compress(const Backend& backend, const CompressParams& params) {
  INFLLM_TRY(check_cache("compress", params.pages, params.batch));
  if (!params.pages.layout.pooled_keys) {
    return invalid_argument(
        "compress: the cache has no room for pooled keys; lay it out with pooled_keys = true");
  }
  return run_cell("compress", backend, backend.kernels->compress, params, {});
}

}  // namespace infllm
