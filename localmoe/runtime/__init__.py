"""Test time: from a prompt to its merged model, and to tokens."""
