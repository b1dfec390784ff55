"""The decisions of the HA layer: functions of values, with no library, thread, clock or I/O beneath them."""
