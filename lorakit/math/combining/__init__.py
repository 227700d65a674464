"""Methods that make one update of several updates of the same weight; `methods` has the table."""
