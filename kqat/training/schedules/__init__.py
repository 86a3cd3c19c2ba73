"""Schedules: callbacks that change how a QAT model rounds while it trains, one module each."""
