"""What every program needs and no student has to read: command line, checkpoints, devices, logs, presets."""
