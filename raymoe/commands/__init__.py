"""The commands of `raymoe`: parse arguments, call the rooms below, print, and set the exit status."""
