"""Fast, exact operations of the encoders: EdgeConv without edges, neighbor search, pooling, Triton kernels."""
