"""Fine-tuning of a model on the GLUE tasks: data, training, scores and their comparison."""
