"""Linear layers by our CUDA kernels in TensorRT: the operator of the graph, and the plugins that compute it."""
