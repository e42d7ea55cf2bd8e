"""What is particular to Cog: its inputs and schema without Docker, trainings and what its server leaves undone."""
