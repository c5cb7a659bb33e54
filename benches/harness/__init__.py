"""What every bench stands on: contenders timed in turns, machines told apart, ratios compared."""
