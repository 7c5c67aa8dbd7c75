"""A page on this machine on which two plans answer the same question side by side.

:mod:`mmfast.ui.session` answers and knows nothing of browsers; :mod:`mmfast.ui.app` shows it with gradio.
"""
