/* SPDX-License-Identifier: BSD-3-Clause
 * The part of CUDA's driver that builds graphs, for a machine that has none. The compiler checks it against cuda.h, and
 * with it names, types and the layout of what Python hands over. A function's handle is the address of its parameters'
 * sizes, which end with 0. Each node is written to stdout as a line of JSON.
 */
#include <cuda.h>
#include <stdio.h>

static int num_nodes;

CUresult cuGraphCreate(CUgraph *graph, unsigned int flags) {
  *graph = (CUgraph)(size_t)0x6000;
  num_nodes = 0;
  return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* Where the device finds page-locked memory: elsewhere, so that whoever does not ask is found out. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)data = pointer + (1ULL << 60);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction func, size_t index, size_t *offset, size_t *size) {
  const size_t *sizes = (const size_t *)func;
  for (size_t i = 0; i <= index; ++i)
    if (sizes[i] == 0) return CUDA_ERROR_INVALID_VALUE;
  *offset = 8 * index;
  *size = sizes[index];
  return CUDA_SUCCESS;
}

CUresult cuGraphAddKernelNode(CUgraphNode *node, CUgraph graph, const CUgraphNode *dependencies, size_t num_dependencies,
                              const CUDA_KERNEL_NODE_PARAMS *params) {
  const size_t *sizes = (const size_t *)params->func;
  if (graph != (CUgraph)(size_t)0x6000 || params->extra || num_dependencies != (num_nodes > 0 ? 1u : 0u) ||
      (num_nodes > 0 && dependencies[0] != (CUgraphNode)(size_t)num_nodes))
    return CUDA_ERROR_INVALID_VALUE;
  printf("{\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"params\": [", params->gridDimX,
         params->gridDimY, params->gridDimZ, params->blockDimX, params->blockDimY, params->blockDimZ,
         params->sharedMemBytes);
  for (size_t i = 0; sizes[i] != 0; ++i) {
    long long value = sizes[i] == 8 ? *(long long *)params->kernelParams[i] : *(int *)params->kernelParams[i];
    printf("%s%lld", i > 0 ? ", " : "", value);
  }
  printf("]}\n");
  *node = (CUgraphNode)(size_t)++num_nodes;
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiate(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
  *exec = (CUgraphExec)(size_t)0x7000;
  return graph == (CUgraph)(size_t)0x6000 && flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  if (exec != (CUgraphExec)(size_t)0x7000) return CUDA_ERROR_INVALID_VALUE;
  printf("{\"launched_on\": %zu}\n", (size_t)stream);
  fflush(stdout);
  return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec exec) { return exec ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

CUresult cuGraphDestroy(CUgraph graph) { return graph ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
