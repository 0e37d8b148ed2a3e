"""Networks: tensors in, tensor out. They know no noise schedule, no memory bank and no training."""
