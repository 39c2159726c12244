"""Training with Lightning: the module, the loggers, and `fit`, which the commands share."""
