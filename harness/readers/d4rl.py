"""D4RL's names: $D4RL_DATASET_DIR or ~/.d4rl/datasets, downloaded when absent."""

from harness.readers.fetch import download
from harness.readers.files import read_file
from harness.tasks import Task, build, find_row, reference_scores, table

# {path} is the column of data/d4rl_files.csv, {file} its last part.
D4RL_MIRRORS = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
    "https://web.archive.org/web/2025id_/http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
)


def read(name, eval_env):
    """The task is built before anything is downloaded."""
    row, task = find_row("d4rl_tasks.csv", name), None
    if eval_env is None and row["note"]:
        print(f"note: {name}: {row['note']}")
    if eval_env is None and row["env_id"]:
        task = own_task(row)
    elif eval_env not in (None, "none"):
        task = Task(eval_env)
    if task:
        # MuJoCo 2.0 recorded 84 contact forces of the ant, all zero.
        task.pad = 84 * (task.id == "Ant-v4")
        task = build(task, row["env_id"], reference_scores(name))
    file = table("d4rl_files.csv")[name]
    folder = "~/.d4rl/datasets"  # D4RL's own
    known = {key: file[key] for key in ("bytes", "sha256")}
    path = download(name, "D4RL", folder, file["path"], D4RL_MIRRORS, known)
    return read_file(path, "none", task, row)


def own_task(row) -> Task:
    """The task of a row of d4rl_tasks.csv."""
    kwargs, maze = {"max_episode_steps": int(row["max_episode_steps"])}, row["maze"]
    if maze:  # upside down: D4RL's y grows with the row, gymnasium-robotics' falls
        cells = [[int(c) if c in "01" else c for c in line] for line in maze.split()]
        kwargs |= {"maze_map": cells[::-1], "continuing_task": False}
    return Task(row["env_id"], kwargs=kwargs, d4rl_maze=bool(maze))
