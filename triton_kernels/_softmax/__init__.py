"""Softmax and log-softmax over any dimension, and their backward passes."""
