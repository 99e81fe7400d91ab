"""Language models: the same adapter layers as for images, on transformers, PEFT and lm-eval."""
