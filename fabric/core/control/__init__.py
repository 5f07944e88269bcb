"""The control loop, every second: is the SLO met, how many replicas, which version gets what."""
