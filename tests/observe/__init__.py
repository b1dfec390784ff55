"""What running processes show of themselves: segments, status, watch, metrics, events."""
