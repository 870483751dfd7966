"""The GlobEnc tab of TensorBoard: what a validation leaves in the event file, and who shows it."""
