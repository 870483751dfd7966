"""What a LightningModule decides, found by watching its own step, and how that step is run again on the probe."""
