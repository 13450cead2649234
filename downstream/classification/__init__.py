"""Object classification: linear SVM, few labels, retrieval."""
