"""The command, the stages of a run and the clusters they run on."""
