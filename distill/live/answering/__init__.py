"""Conversation mode of the live page: who answers, who understands speech, and the talker that joins them with a voice."""
