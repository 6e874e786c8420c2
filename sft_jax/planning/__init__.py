"""What a run would need of machines that are not there: memory, work, communication, time and price."""
