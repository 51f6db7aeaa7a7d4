"""How a matmul and the all-reduce of its result are run, one technique per file; `problem` is what they share."""
