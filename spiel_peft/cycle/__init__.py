"""The SpIEL cycle: schedule, growth criteria, windows and the engine that sequences them."""
