"""The networks as plain nn.Modules, without files or training."""
