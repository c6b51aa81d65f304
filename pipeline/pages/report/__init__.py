"""`grappa report`: the results of a finished run as one page, or as a folder of plain files, to read and to share."""
