"""What a model or an optimizer does, read off its jaxpr: costs, roles of weights, channels, invariants."""
