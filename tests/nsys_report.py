"""A report as `nsys export --type=sqlite` writes it: the tables that are read, with all their columns, as the user guide of Nsight
Systems has them (SQLite Schema Reference, schema 3.16 of version 2024.6)."""

import sqlite3
from contextlib import closing
from pathlib import Path

_RUN = "start end deviceId contextId greenContextId? streamId correlationId? globalPid?"
TABLES = {  # a question mark: may be NULL
    "StringIds": "id value",
    "ENUM_CUDA_MEMCPY_OPER": "id name? label?",
    "NVTX_EVENTS": "start end? eventType rangeId? category? color? text? globalTid? endGlobalTid? textId? domainId? uint64Value? "
    "int64Value? doubleValue? uint32Value? int32Value? floatValue? jsonTextId? jsonText? binaryData?",
    "CUPTI_ACTIVITY_KIND_KERNEL": f"{_RUN} demangledName shortName mangledName? launchType? cacheConfig? registersPerThread gridX "
    "gridY gridZ blockX blockY blockZ staticSharedMemory dynamicSharedMemory localMemoryPerThread localMemoryTotal gridId "
    "sharedMemoryExecuted? graphNodeId? sharedMemoryLimitConfig?",
    "CUPTI_ACTIVITY_KIND_MEMCPY": f"{_RUN} bytes copyKind deprecatedSrcId? srcKind? dstKind? srcDeviceId? srcContextId? "
    "dstDeviceId? dstContextId? migrationCause? graphNodeId? virtualAddress?",
    "CUPTI_ACTIVITY_KIND_MEMSET": f"{_RUN} value bytes graphNodeId? memKind?",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": f"{_RUN} graphId graphExecId",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end eventClass globalTid? correlationId? nameId returnValue callchainId?",
}
MEMCPY = {1: "Host-to-Device", 2: "Device-to-Host", 8: "Device-to-Device"}


class Report:
    """Rows by table; tables without rows are not written, as nsys does."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict]] = {}
        self._strings: dict[str, int] = {}
        for number, label in MEMCPY.items():
            self.add("ENUM_CUDA_MEMCPY_OPER", id=number, label=label)

    def add(self, table: str, **values: object) -> None:
        self.rows.setdefault(table, []).append(values)

    def string(self, text: str) -> int:
        return self._strings.setdefault(text, 100 + len(self._strings))

    def domain(self, process: int, number: int, name: str) -> None:
        self.add("NVTX_EVENTS", start=0, eventType=75, globalTid=process + 1, domainId=number, text=name)

    def range(self, thread: int, start: int, end: int | None, text: str, domain: int, registered: bool = True) -> None:
        said = {"textId": self.string(text)} if registered else {"text": text}
        self.add("NVTX_EVENTS", start=start, end=end, eventType=59, globalTid=thread, domainId=domain, **said)

    def launch(self, thread: int, at: int, correlation: int) -> None:
        call = self.string("cudaLaunchKernel")
        self.add("CUPTI_ACTIVITY_KIND_RUNTIME", start=at, end=at + 2, globalTid=thread, correlationId=correlation, nameId=call)

    def ran(self, table: str, process: int, start: int, end: int, correlation: int, **more: object) -> None:
        table = f"CUPTI_ACTIVITY_KIND_{table}"
        self.add(table, start=start, end=end, globalPid=process, correlationId=correlation, **more)

    def kernel(self, process: int, start: int, end: int, correlation: int, name: str, whole: str | None = None) -> None:
        names = {"shortName": self.string(name), "demangledName": self.string(whole or f"{name}(float*)")}
        self.ran("KERNEL", process, start, end, correlation, **names)

    def write(self, path: Path) -> None:
        for text, number in self._strings.items():
            self.add("StringIds", id=number, value=text)
        with closing(sqlite3.connect(path)) as database, database:
            for table, rows in self.rows.items():
                columns = {name.rstrip("?"): "" if name.endswith("?") else "NOT NULL" for name in TABLES[table].split()}
                database.execute(f"CREATE TABLE {table} ({', '.join(f'{name} {null}' for name, null in columns.items())})")
                for row in rows:
                    assert row.keys() <= columns.keys(), row.keys() - columns.keys()
                    values = {name: 0 for name, null in columns.items() if null} | row
                    holes = ", ".join("?" * len(values))
                    database.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({holes})", tuple(values.values()))
