"""The three stages of a run: what each draws from the pictures, trains, reports and leaves in the run folder.

Networks come from `build`, pictures from `data`, losses and the loop from `training`; none of those know each other.
"""
