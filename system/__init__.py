"""What the program asks of the system: files, the terminal, the machine's limits, the processes of a job."""
