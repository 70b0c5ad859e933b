"""The program's access to the system: files, the terminal, the machine's limits, the processes of a job."""
