"""Run the cells of a notebook in a real kernel, those after the first two twice, and print the output of the last run.

python run_notebook.py NOTEBOOK
"""

import sys

import nbformat
from nbclient import NotebookClient


def main(path: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": "."}})
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells[:-1]):
            client.execute_cell(cell, index)
        for index, cell in enumerate(notebook.cells[2:], start=2):  # as a person does who changes a cell
            client.execute_cell(cell, index)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            print(output.get("data", {}).get("text/plain", output.get("text", "")))


main(*sys.argv[1:])
