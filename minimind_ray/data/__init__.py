"""From source files to training batches: files, rows, documents, packs, batches."""
