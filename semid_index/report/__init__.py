"""The quality of a set of semantic IDs: measured, in words, in plots, and as a page.

From vectors and codes to a page: ``quality`` measures (by the functions of ``measures``, and the passes over vectors of
``reconstruction``) and gives the values of ``records``; ``words`` and ``plots`` say and show them, and ``page`` joins
both. ``id_files`` reads the IDs that others made, ``inputs`` the items of an index, ``command`` is ``semid report``.
"""
