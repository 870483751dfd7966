"""Where results go: heatmaps, filmstrips and curves as arrays, the loggers that show them, and the dashboard."""
