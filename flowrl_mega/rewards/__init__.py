"""Rewards: functions of (row, response) that return a number, or a number and the reason for it."""
