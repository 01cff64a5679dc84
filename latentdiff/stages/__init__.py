"""Stages: what each stage of a run reads from the data, trains, reports and writes to the run's folder.

Networks come from `families`, pictures from `data`, losses and the loop from `training`.
"""
