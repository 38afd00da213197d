// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

// TestFailure: what a client finds in it, after the way it takes, is what CRIU's
// own answers have.
func TestFailure(t *testing.T) {
	for kind, want := range map[rpc.CriuReqType]*rpc.CriuResp{
		rpc.CriuReqType_DUMP:             {Type: rpc.CriuReqType_DUMP.Enum(), Dump: &rpc.CriuDumpResp{Restored: proto.Bool(false)}},
		rpc.CriuReqType_RESTORE:          {Type: rpc.CriuReqType_RESTORE.Enum(), Restore: &rpc.CriuRestoreResp{Pid: proto.Int32(-1)}},
		rpc.CriuReqType_PAGE_SERVER_CHLD: {Type: rpc.CriuReqType_PAGE_SERVER.Enum()},
		rpc.CriuReqType_VERSION:          {Type: rpc.CriuReqType_VERSION.Enum()},
		rpc.CriuReqType_EMPTY:            {Type: rpc.CriuReqType_EMPTY.Enum()},
	} {
		want.Success, want.CrErrno, want.CrErrmsg = proto.Bool(false), proto.Int32(int32(unix.EBUSY)), proto.String("why")
		b, err := proto.Marshal(criurpc.Failure(kind, unix.EBUSY, "why"))
		got := &rpc.CriuResp{}
		if err == nil {
			err = proto.Unmarshal(b, got) // which fails if something required is missing
		}
		if err != nil || !proto.Equal(got, want) {
			t.Errorf("%v: %v, %v; expected %v", kind, got, err, want)
		}
	}
}
