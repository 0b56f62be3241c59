"""Planning for machines that are not there: the abstract step, a cost model, topologies, reading compiled programs."""
