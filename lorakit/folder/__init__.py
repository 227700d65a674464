"""What lies beside the tensors in a model folder: index, config facts, companions, model card,
manifest.
"""
