"""Ray: where workers run, how they are called, how their failures reach the driver."""
