"""Why the encoders are fast, all exact: layers, EdgeConv without edges, neighbors, pooling, kernels."""
